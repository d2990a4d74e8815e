"""The methods: one file each, one `System` in it; a new file is a new command."""
