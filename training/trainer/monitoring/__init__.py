"""What is watched and written while a run goes on."""
