"""The script registers a device for the whole process, so only its own process may import it."""

collect_ignore = ["foreign_device_script.py"]
