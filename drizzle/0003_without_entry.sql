-- Finds the rows that another system published, when they are old enough to be deleted. The relay's own never enter it.
CREATE INDEX IF NOT EXISTS "relay_outbox_without_entry" ON "identity"."outbox" USING btree (coalesce(published_at, created_at),"id") WHERE published and stream_entry_id is null;
