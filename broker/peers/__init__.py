"""Who else there is: nodes, members of rooms, ephemeral events, questions."""
