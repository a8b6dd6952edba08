"""The work behind the commands: files and records in and out; knows no click."""
