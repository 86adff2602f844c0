"""Files that are complete or absent, arrays larger than memory, and progress bars."""
