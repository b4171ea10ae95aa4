"""The model and data of the main job, which is also the shortest example of a project."""
