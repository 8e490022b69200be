"""From a model directory to a traced graph. The only room that imports torch and transformers."""
