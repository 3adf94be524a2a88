"""What a run leaves on storage, and who may write there."""
