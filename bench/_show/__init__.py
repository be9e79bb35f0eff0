"""Tables and pictures of measurements."""
