"""One optimizer step: plain and DeepSpeed steppers, ZeRO layouts, parameter groups, loss scaling, averages."""
