"""Files in and out: NIfTI, NRRD, previews, records, atomic writing. Knows no network."""
