"""Root file system images, writable layers and volumes."""
