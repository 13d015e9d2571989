"""The commands of `stoker`, one file each."""
