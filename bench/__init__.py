"""Side-by-side measurements, and the script that trains the demo model; imported as `qmoe_lite.bench`."""
