"""What is compiled: knows arrays, steps and shapes, and nothing of epochs, callbacks or files."""
