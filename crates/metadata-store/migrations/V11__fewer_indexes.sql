-- Each of these was written twice for every job and read rarely. Expired leases are found by reading all reservations, and
-- a tenant's running jobs are the requests that its windows have reserved.
DROP INDEX reservations_by_lease;
DROP INDEX reservations_by_tenant;
