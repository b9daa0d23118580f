-- A dispatch that its agent could not take (its disk is full, say) is ready again, and offered from then on.
ALTER TABLE activity_history ADD COLUMN offer_after timestamptz;

-- When the device's agent said that it stops; null once it was heard again. Such a device is offline at once.
ALTER TABLE devices ADD COLUMN left_at timestamptz;
