"""What happens when: plain control flow, with no JAX in it."""
