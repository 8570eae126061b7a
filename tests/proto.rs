//! The proto teaches: every element of it has a comment.

use prost_types::{DescriptorProto, FileDescriptorProto};
use std::collections::HashSet;

/// The numbers of fields in descriptor.proto that make up the path of an element.
const FILE_MESSAGES: i32 = 4;
const FILE_ENUMS: i32 = 5;
const FILE_SERVICES: i32 = 6;
const MESSAGE_FIELDS: i32 = 2;
const MESSAGE_ONEOFS: i32 = 8;
const ENUM_VALUES: i32 = 2;
const SERVICE_METHODS: i32 = 2;

fn proto() -> FileDescriptorProto {
    let mut compiler = protox::Compiler::new(["proto"]).unwrap();
    compiler.include_source_info(true);
    compiler
        .open_file("chatmemory/v1/chat_memory.proto")
        .unwrap();
    compiler.file_descriptor_set().file.remove(0)
}

fn index(index: usize) -> i32 {
    i32::try_from(index).unwrap()
}

/// Every element with its path.
fn elements(file: &FileDescriptorProto) -> Vec<(String, Vec<i32>)> {
    let mut elements = Vec::new();
    let mut add = |name: String, path: &[i32]| elements.push((name, path.to_vec()));
    for (m, message) in file.message_type.iter().enumerate() {
        let path = [FILE_MESSAGES, index(m)];
        add(message.name().to_owned(), &path);
        for (f, field) in message.field.iter().enumerate() {
            let name = format!("{}.{}", message.name(), field.name());
            add(name, &[path[0], path[1], MESSAGE_FIELDS, index(f)]);
        }
        for (o, name) in real_oneofs(message) {
            let name = format!("{}.{name}", message.name());
            add(name, &[path[0], path[1], MESSAGE_ONEOFS, index(o)]);
        }
    }
    for (e, kind) in file.enum_type.iter().enumerate() {
        add(kind.name().to_owned(), &[FILE_ENUMS, index(e)]);
        for (v, value) in kind.value.iter().enumerate() {
            add(
                value.name().to_owned(),
                &[FILE_ENUMS, index(e), ENUM_VALUES, index(v)],
            );
        }
    }
    for (s, service) in file.service.iter().enumerate() {
        add(service.name().to_owned(), &[FILE_SERVICES, index(s)]);
        for (m, method) in service.method.iter().enumerate() {
            let path = [FILE_SERVICES, index(s), SERVICE_METHODS, index(m)];
            add(method.name().to_owned(), &path);
        }
    }
    elements
}

/// The oneofs that are written as such; `optional` makes one in the descriptor too.
fn real_oneofs(message: &DescriptorProto) -> Vec<(usize, &str)> {
    let made_up: HashSet<i32> = message
        .field
        .iter()
        .filter(|field| field.proto3_optional())
        .filter_map(|field| field.oneof_index)
        .collect();
    let oneofs = message.oneof_decl.iter().enumerate();
    let real = oneofs.filter(|(o, _)| !made_up.contains(&index(*o)));
    real.map(|(o, oneof)| (o, oneof.name())).collect()
}

#[test]
fn every_element_has_a_comment() {
    let file = proto();
    let info = file.source_code_info.clone().expect("source info");
    let commented: HashSet<Vec<i32>> = info
        .location
        .into_iter()
        .filter(|location| !location.leading_comments().trim().is_empty())
        .map(|location| location.path)
        .collect();
    let elements = elements(&file);
    assert!(elements.len() > 100);
    let bare: Vec<_> = elements
        .iter()
        .filter(|(_, path)| !commented.contains(path))
        .collect();
    assert!(bare.is_empty(), "without a comment: {bare:?}");
}

#[test]
fn the_names_that_clients_rely_on_are_there() {
    let file = proto();
    assert_eq!(file.package(), "chatmemory.v1");
    let names: HashSet<String> = elements(&file).into_iter().map(|(name, _)| name).collect();
    for name in [
        "ChatMemory",
        "Append",
        "GetMessages",
        "Clear",
        "Chat",
        "ROLE_UNSPECIFIED",
        "ROLE_SYSTEM",
        "ROLE_USER",
        "ROLE_ASSISTANT",
        "ROLE_TOOL",
        "ROLE_OTHER",
        "Message.sequence",
        "Message.id",
        "Message.role",
        "Message.content",
        "Message.parts",
        "Message.tool_calls",
        "Message.tool_call_id",
        "Message.name",
        "Message.create_time",
        "Message.interrupted",
        "Message.raw",
        "AppendRequest.session_id",
        "AppendRequest.messages",
        "AppendRequest.request_id",
        "AppendRequest.expected_last_sequence",
        "AppendResponse.messages",
        "GetMessagesRequest.page_size",
        "GetMessagesRequest.page_token",
        "GetMessagesRequest.order",
        "GetMessagesRequest.last_messages",
        "GetMessagesRequest.last_turns",
        "GetMessagesRequest.max_tokens",
        "GetMessagesRequest.include_raw",
        "GetMessagesResponse.messages",
        "GetMessagesRequest.model",
        "GetMessagesResponse.next_page_token",
        "GetMessagesResponse.token_count",
        "GetMessagesResponse.tokenizer",
        "ClearRequest.session_id",
        "ClearResponse.deleted_count",
        "ChatRequest.turn_id",
        "ChatRequest.model",
        "ChatRequest.system_prompt",
        "ChatRequest.resume_after",
        "ChatRequest.on_conflict",
        "ChatRequest.on_disconnect",
        "ChatRequest.last_turns",
        "ChatRequest.max_tokens",
        "ChatResponse.event_number",
        "ChatResponse.started",
        "ChatResponse.delta",
        "ChatResponse.completed",
        "Started.turn_id",
        "Started.history_tokens",
        "Started.tokenizer",
        "Delta.text",
        "Completed.messages",
    ] {
        assert!(names.contains(name), "{name}");
    }
}
