"""From a folder of pictures to tensors on the device."""
