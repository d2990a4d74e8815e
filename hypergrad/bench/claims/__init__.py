"""Claims about speed, memory and accuracy, one file each: `measure()` makes the measurement that decides it."""
