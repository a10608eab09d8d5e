"""What every command does before it searches or trains: the job, the teacher, the views, the library."""
