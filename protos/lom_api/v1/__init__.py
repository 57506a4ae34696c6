"""Generated messages and stubs of `lom_api.v1` (`make protos`)."""
