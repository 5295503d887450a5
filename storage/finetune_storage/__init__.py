"""Object storage for every room: URI to store, retries, bundles whose manifest is written last."""
