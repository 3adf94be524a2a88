"""The ground floor: ranks and their devices, what they tell each other, number formats, schedules."""
