"""What a file may claim: sizes, counts and depths that it states are held against limits before they are believed."""
