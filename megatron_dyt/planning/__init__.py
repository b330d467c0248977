"""From a recipe and a cluster to a parallel layout, its memory and its time; and a dry run of it."""
