"""Pictures and clips, from files to the patches that the vision tower reads; needs the extra `vision` (Pillow, av)."""
