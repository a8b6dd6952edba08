"""The work behind the commands: files and records in and out, without click."""
