-- Until when a site's enrollment code opens anything; codes from before do not end by themselves.
ALTER TABLE sites ADD COLUMN enrollment_code_expires_at timestamptz;
