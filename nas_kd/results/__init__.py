"""What a user takes home: choosing, refinement, export, report."""
