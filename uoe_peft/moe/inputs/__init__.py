"""What routers and single slices are multiplied with."""
