"""Image store, references, layouts, archives, registries, conversion.

Import `kata.images.store` on the hot path; everything else is imported on demand.
"""
