"""What two or more optimizations share."""
