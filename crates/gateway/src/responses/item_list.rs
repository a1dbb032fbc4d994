//! Pages of the items that a response was generated from.

use protocol::WireError;
use serde::Serialize;
use utoipa::ToSchema;

use super::item::{Item, ItemRole, ItemSchema};
use crate::json_body::invalid;
use crate::openai::request::{Content, Part};

/// The most items of a page, and how many it has by default.
const LIMIT_MAX: u32 = 100;
const LIMIT: u32 = 20;

/// A page of items.
#[derive(Serialize, ToSchema)]
#[schema(as = ResponseItemList)]
pub(crate) struct ItemList {
    /// Kind of the object: always `list`.
    object: &'static str,
    #[schema(value_type = Vec<ItemSchema>)]
    data: Vec<Item>,
    first_id: Option<String>,
    last_id: Option<String>,
    has_more: bool,
}

/// Which page of items.
#[derive(Debug, Default)]
pub(crate) struct ItemQuery {
    pub(crate) limit: Option<u32>,
    pub(crate) order: Option<String>,
    pub(crate) after: Option<String>,
}

impl ItemList {
    /// Returns a page of a conversation. Items without an id get one that follows from the response's.
    pub(crate) fn page(items: Vec<Item>, response_id: &str, query: &ItemQuery) -> Result<Self, WireError> {
        let limit = query.limit.unwrap_or(LIMIT);
        if !(1..=LIMIT_MAX).contains(&limit) {
            return Err(invalid("limit", &format!("must be between 1 and {LIMIT_MAX}")));
        }
        let mut items: Vec<Item> =
            items.into_iter().enumerate().map(|(index, item)| item.listed(response_id, index)).collect();
        match query.order.as_deref() {
            None | Some("desc") => items.reverse(),
            Some("asc") => {}
            Some(_) => return Err(invalid("order", "must be asc or desc")),
        }
        if let Some(after) = &query.after {
            let known = items.iter().position(|item| item.id.as_ref() == Some(after));
            let known = known.ok_or_else(|| invalid("after", "is no item of this response"))?;
            items.drain(..=known);
        }
        let has_more = items.len() > limit as usize;
        items.truncate(limit as usize);
        let id = |item: Option<&Item>| item.and_then(|item| item.id.clone());
        let (first_id, last_id) = (id(items.first()), id(items.last()));
        Ok(Self { object: "list", data: items, first_id, last_id, has_more })
    }
}

impl Item {
    /// Returns the item with everything that clients expect of a listed one.
    fn listed(mut self, response_id: &str, index: usize) -> Self {
        let kind = self.kind.get_or_insert_with(|| "message".to_owned());
        let prefix = match &**kind {
            "reasoning" => "rs",
            "function_call" => "fc",
            "custom_tool_call" => "ctc",
            "function_call_output" => "fco",
            "custom_tool_call_output" => "ctco",
            _ => "msg",
        };
        let of_message = prefix == "msg";
        self.id.get_or_insert_with(|| format!("{prefix}_{}i{index:02}", response_id.trim_start_matches("resp_")));
        self.status.get_or_insert_with(|| "completed".to_owned());
        if let Some(Content::Text(text)) =
            self.content.take_if(|content| matches!(content, Content::Text(_)) && of_message)
        {
            let kind = if self.role == Some(ItemRole::Assistant) { "output_text" } else { "input_text" };
            self.content = Some(Content::Parts(vec![Part { kind: kind.to_owned(), text: Some(text), refusal: None }]));
        }
        self
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn page(query: &ItemQuery) -> Result<Value, WireError> {
        let items = json!([
            {"role": "user", "content": "one"}, {"type": "function_call", "id": "fc_x", "call_id": "1", "name": "f", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "1", "output": "two"}
        ]);
        let items = serde_json::from_value(items).expect("items");
        ItemList::page(items, "resp_7", query).map(|page| serde_json::to_value(page).expect("JSON"))
    }

    #[test]
    fn items_are_listed_page_by_page_in_either_order() {
        let first = page(&ItemQuery { limit: Some(2), ..ItemQuery::default() }).expect("a page");
        assert_eq!((&first["first_id"], &first["last_id"]), (&json!("fco_7i02"), &json!("fc_x")));
        assert_eq!((&first["has_more"], &first["object"]), (&json!(true), &json!("list")));
        let query = ItemQuery { after: Some("fc_x".into()), ..ItemQuery::default() };
        let rest = page(&query).expect("a page");
        let message = json!({"id": "msg_7i00", "type": "message", "status": "completed", "role": "user",
                             "content": [{"type": "input_text", "text": "one"}]});
        assert_eq!((&rest["data"], &rest["has_more"]), (&json!([message]), &json!(false)));
        let ascending = page(&ItemQuery { order: Some("asc".into()), ..ItemQuery::default() }).expect("a page");
        assert_eq!(ascending["data"][0], message);
    }

    #[test]
    fn a_page_that_is_none_is_refused() {
        for (query, param) in [
            (ItemQuery { limit: Some(0), ..ItemQuery::default() }, "limit"),
            (ItemQuery { limit: Some(101), ..ItemQuery::default() }, "limit"),
            (ItemQuery { order: Some("up".into()), ..ItemQuery::default() }, "order"),
            (ItemQuery { after: Some("msg_9".into()), ..ItemQuery::default() }, "after"),
        ] {
            assert_eq!(page(&query).expect_err(param).param.as_deref(), Some(param));
        }
    }
}
