//! The behaviour that every [`JobStore`] and every [`RegistryStore`] has. An implementation is checked by one call of
//! [`job_store_conforms`] or [`registry_store_conforms`].

pub(crate) mod catalogue;
pub(crate) mod concurrency;
pub(crate) mod dead_letters;
pub(crate) mod jobs;
pub(crate) mod membership;
pub(crate) mod quotas;
pub(crate) mod samples;

use std::sync::Arc;

use tether_metadata_store::{JobStore, RegistryStore};

/// A store under test, and what must live as long as it does.
pub(crate) struct Subject<S: ?Sized> {
    pub(crate) store: Arc<S>,
    pub(crate) _keep: Box<dyn Send>,
}

pub(crate) type Jobs = Subject<dyn JobStore>;
pub(crate) type Registry = Subject<dyn RegistryStore>;

/// Makes a test of each behaviour, on stores that `$make` makes.
macro_rules! job_store_conforms {
    ($make:path) => {
        $crate::conformance::behaviours! { $make =>
            jobs: a_reserved_job_is_found_as_it_was_written,
            jobs: the_same_key_again_returns_the_job_there_is,
            jobs: a_resend_finds_its_job_even_while_the_worker_is_full,
            jobs: another_tenant_token_or_id_is_another_job,
            jobs: a_full_worker_takes_no_further_job,
            jobs: a_settled_job_frees_its_slot,
            jobs: a_settled_job_says_how_it_ended,
            jobs: a_second_settlement_changes_and_bills_nothing,
            jobs: only_completed_and_cancelled_jobs_are_billed,
            jobs: an_attempt_that_was_given_up_on_cannot_settle,
            jobs: a_job_moves_to_another_worker_as_its_next_attempt,
            jobs: a_job_moves_only_from_its_present_attempt,
            jobs: a_job_stays_where_it_is_when_the_next_worker_is_full,
            jobs: a_job_may_try_again_on_its_own_full_worker,
            jobs: a_job_that_came_to_nothing_runs_again_as_its_next_attempt,
            jobs: an_answer_is_kept_with_its_settlement_and_no_other,
            jobs: answers_are_pruned_by_age_and_by_bytes,
            jobs: answers_of_the_tenant_that_has_most_give_way_first,
            jobs: a_note_is_kept_before_its_job_or_with_its_answer_and_removed_with_it,
            jobs: notes_are_pruned_by_age_and_by_bytes,
            jobs: a_job_nobody_wrote_is_not_found,
            jobs: a_lease_that_ran_out_fails_its_job_and_frees_the_slot,
            jobs: a_renewed_lease_lives_on_and_is_never_shortened,
            jobs: a_stale_attempt_does_not_renew_the_lease_of_its_successor,
            jobs: usage_is_read_in_pages_without_gap_or_repeat,
            jobs: usage_is_each_tenants_own,
            jobs: a_mark_is_raised_and_never_lowered,
            jobs: a_closed_store_says_so,
            jobs: the_attempts_of_a_job_are_kept_with_it,
            jobs: jobs_are_listed_in_pages_by_status_tenant_and_model,
            jobs: old_jobs_are_removed_and_running_ones_and_usage_stay,
            dead_letters: a_dead_letter_is_written_with_its_settlement,
            dead_letters: a_settlement_that_changes_nothing_writes_no_letter,
            dead_letters: the_oldest_letters_make_room,
            dead_letters: letters_are_listed_in_pages_by_tenant_and_model,
            dead_letters: letters_are_deleted_by_request_number_and_age,
            dead_letters: an_expired_lease_leaves_no_letter,
            quotas: a_job_holds_its_tokens_until_it_is_settled,
            quotas: a_limit_admits_its_last_token_and_no_more,
            quotas: a_job_is_settled_in_the_windows_in_which_it_was_reserved,
            quotas: a_job_that_costs_nothing_gives_everything_back,
            quotas: a_moved_job_takes_its_quota_along,
            quotas: a_move_raises_what_a_job_holds_and_never_lowers_it,
            quotas: a_move_that_exceeds_a_limit_changes_nothing,
            quotas: a_move_is_counted_in_the_windows_in_which_its_job_was_reserved,
            quotas: a_reservation_that_does_not_count_holds_no_quota,
            quotas: a_resend_needs_no_quota,
            quotas: nothing_is_billed_beyond_what_was_reserved,
            quotas: without_limits_of_tokens_a_job_is_billed_what_it_used,
            quotas: quotas_are_each_tenants_own,
            quotas: of_64_jobs_exactly_those_run_for_which_there_are_tokens,
            quotas: random_operations_use_what_the_reference_says,
            concurrency: of_64_reservations_of_one_slot_exactly_one_is_made,
            concurrency: of_64_resends_of_one_job_exactly_one_is_new,
            concurrency: of_64_settlements_of_one_job_exactly_one_bills,
            concurrency: random_traffic_never_overcommits_a_worker_and_bills_each_job_once,
        }
    };
}

/// Makes a test of each behaviour, on stores that `$make` makes.
macro_rules! registry_store_conforms {
    ($make:path) => {
        $crate::conformance::behaviours! { $make =>
            catalogue: a_token_is_found_as_it_was_written,
            catalogue: a_key_id_is_given_once,
            catalogue: a_revoked_token_keeps_the_time_of_its_first_revocation,
            catalogue: a_tenants_latest_rules_hold,
            catalogue: a_model_version_never_changes_its_digest,
            catalogue: what_is_known_of_a_model_stays_known,
            catalogue: an_alias_stands_for_its_latest_target_and_never_for_a_models_own_name,
            catalogue: a_model_that_was_added_stays_so,
            catalogue: how_long_a_model_is_kept_outlives_its_registration,
            catalogue: models_are_listed_by_name_and_number,
            catalogue: a_removed_model_is_gone,
            catalogue: adapters_are_listed_by_model_and_name,
            catalogue: an_adapter_needs_its_model_and_keeps_its_digest,
            catalogue: a_removed_adapter_is_gone_and_goes_with_its_model,
            membership: an_invite_is_found_as_it_was_written,
            membership: an_invite_is_redeemed_by_one_node_only,
            membership: a_certificate_has_a_number_greater_than_all_before,
            membership: a_revoked_node_keeps_its_first_time_and_version,
            membership: versions_of_the_revocation_list_grow_whatever_the_clock_says,
            concurrency: of_64_nodes_that_redeem_one_invite_exactly_one_does,
        }
    };
}

macro_rules! behaviours {
    ($make:path => $($group:ident : $behaviour:ident),* $(,)?) => {
        $(
            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $behaviour() {
                $crate::conformance::$group::$behaviour($make()).await;
            }
        )*
    };
}

pub(crate) use {behaviours, job_store_conforms, registry_store_conforms};
