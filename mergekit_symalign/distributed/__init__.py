"""A merge on several machines: its graph is cut into independent parts, which Ray's workers execute."""
