"""The HTTP service: requests in, jobs one after the other, items and their slices out, and a page to do it from."""
