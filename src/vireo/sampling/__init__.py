"""What is shown and scored in validation, one file per kind of output."""
