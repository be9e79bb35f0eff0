"""Files: reading and writing model directories, the format on disk, reports, inspection, verification."""
