//! How urgent clients say that their jobs are.

use protocol::policy::ServiceClass;
use protocol::{ErrorCode, WireError};

use crate::json_body::invalid;

/// The header that names a class.
pub(crate) const CLASS: &str = "x-tether-class";

/// Parses the value of the header.
pub(crate) fn parse(name: &str) -> Result<ServiceClass, WireError> {
    let found = ServiceClass::ALL.into_iter().find(|class| class.as_str() == name.trim());
    found.ok_or_else(|| invalid(CLASS, "must be interactive, standard or batch"))
}

/// Parses OpenAI's `service_tier`. `auto` leaves the class open.
pub(crate) fn of_tier(tier: &str) -> Result<Option<ServiceClass>, WireError> {
    match tier {
        "auto" => Ok(None),
        "default" => Ok(Some(ServiceClass::Standard)),
        "flex" => Ok(Some(ServiceClass::Batch)),
        "priority" => Ok(Some(ServiceClass::Interactive)),
        _ => Err(invalid("service_tier", "must be auto, default, flex or priority")),
    }
}

/// Returns the tier as which OpenAI's responses name a class.
pub(crate) fn tier(class: ServiceClass) -> &'static str {
    match class {
        ServiceClass::Interactive => "priority",
        ServiceClass::Standard => "default",
        ServiceClass::Batch => "flex",
    }
}

/// Returns the class that the header and the body of a request name.
pub(crate) fn agreed(
    header: Option<ServiceClass>,
    body: Option<ServiceClass>,
) -> Result<Option<ServiceClass>, WireError> {
    match (header, body) {
        (Some(header), Some(body)) if header != body => {
            let message = format!("{CLASS} and the request's body name different classes; give only one");
            Err(WireError::new(ErrorCode::InvalidValue, message).with_param(CLASS))
        }
        (header, body) => Ok(header.or(body)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tiers_and_classes_are_the_same_in_other_words() {
        for class in ServiceClass::ALL {
            assert_eq!(of_tier(tier(class)), Ok(Some(class)));
            assert_eq!(parse(class.as_str()), Ok(class));
        }
        assert_eq!(of_tier("auto"), Ok(None));
    }

    #[test]
    fn unknown_and_contradicting_names_are_refused() {
        let refused = of_tier("scale").expect_err("unknown");
        assert_eq!(refused.param.as_deref(), Some("service_tier"));
        assert_eq!(parse("urgent").expect_err("unknown").param.as_deref(), Some(CLASS));
        let (batch, standard) = (Some(ServiceClass::Batch), Some(ServiceClass::Standard));
        assert!(agreed(batch, standard).is_err());
        assert_eq!([agreed(batch, batch), agreed(None, batch), agreed(batch, None)], [Ok(batch), Ok(batch), Ok(batch)]);
    }
}
