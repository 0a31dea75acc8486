"""gRPC services: coordination, blobs, administration."""
