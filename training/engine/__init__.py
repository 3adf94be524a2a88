"""How a step is carried out: the loop, its steppers, and the world of processes they run in."""
