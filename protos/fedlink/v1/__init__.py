"""Generated from the .proto files beside this one; `make protos` writes it anew."""
