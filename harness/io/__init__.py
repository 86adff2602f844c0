"""Files that are whole or absent, arrays larger than memory, and progress bars."""
