"""torch FlexAttention on compact block lists."""
