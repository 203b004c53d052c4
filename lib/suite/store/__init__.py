"""What a build leaves in a result folder."""
