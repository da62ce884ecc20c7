"""What `tools/bench/first_hour.sh` runs, section by section."""
