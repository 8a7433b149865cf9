"""Root file system images, writable layers, volumes and shares."""
