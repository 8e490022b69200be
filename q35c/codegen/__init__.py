"""From scheduled graphs to machine code: requests, schedules, memory, weight packing; a folder for each kind of machine."""
