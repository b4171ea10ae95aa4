"""What a module holds and in which mode it is: knows nothing of epochs, callbacks, files or programs."""
