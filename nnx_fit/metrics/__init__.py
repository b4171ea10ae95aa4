"""`self.log`: captured in the trace, reduced on the device, fetched late, handed to History and loggers."""
