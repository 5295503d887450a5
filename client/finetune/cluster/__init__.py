"""A job in a cluster: submitted, watched, read and fetched through the Kubernetes API, with the user's kubeconfig."""
